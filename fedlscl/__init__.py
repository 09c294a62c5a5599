"""Federated continual learning experiments on PyTorch Lightning: Fed-LSCL and what it is compared with."""

__version__ = "0.1.0"
