"""The numbers that the paper reports, to stand beside measured ones; nothing else may use them.

Source: Large-Small Model Collaborative Framework for Federated Continual Learning, Tables 1 and 2.
"""

from __future__ import annotations

TABLE1: dict[str, dict[str, tuple[float, ...]]] = {
    "CIFAR-100": {
        "fedavg": (43.925, 50.678, 57.369, 55.519, 61.230),
        "fedprox": (23.703, 22.803, 26.146, 22.152, 23.664),
        "fedvit": (70.237, 70.139, 71.413, 66.027, 67.389),
        "fed_l2p": (28.427, 29.962, 29.304, 25.440, 25.703),
        "fed_dualprompt": (31.772, 42.839, 52.839, 39.005, 46.398),
        "glfc": (82.055, 63.129, 73.437, 64.230, 64.867),
        "target": (54.023, 41.491, 32.289, 13.913, 15.902),
        "mfcl": (46.723, 16.236, 10.603, 14.616, 13.539),
        "fedmgp": (90.263, 85.307, 90.736, 89.223, 82.236),
        "pilora": (84.961, 78.874, 72.578, 71.104, 64.684),
        "lorm": (93.773, 88.684, 85.160, 84.556, 80.534),
        "fed_lscl": (97.735, 97.419, 96.597, 96.544, 96.932),
    },
    "ImageNet-R": {
        "fedavg": (37.778, 35.427, 35.536, 35.811, 36.751),
        "fedprox": (20.238, 19.762, 19.730, 18.984, 17.882),
        "fedvit": (68.284, 59.818, 57.396, 59.867, 57.950),
        "fed_l2p": (27.183, 27.602, 24.839, 25.103, 26.518),
        "fed_dualprompt": (23.530, 26.630, 26.402, 30.237, 32.038),
        "glfc": (61.934, 67.134, 67.235, 71.713, 57.293),
        "target": (39.993, 15.038, 16.028, 17.506, 16.103),
        "mfcl": (28.856, 14.576, 16.265, 13.347, 13.833),
        "fedmgp": (77.339, 76.830, 78.092, 75.612, 75.407),
        "pilora": (77.107, 68.595, 64.974, 61.348, 56.723),
        "lorm": (87.823, 80.802, 79.618, 75.480, 71.918),
        "fed_lscl": (91.178, 89.155, 86.985, 87.382, 88.150),
    },
}
"""By data set and method: accuracy in % of the global model on each of the five tasks, mean over three seeds."""

TABLE2: dict[str, dict[str, tuple[float, ...]]] = {
    "CIFAR-100": {
        "fed_lscl_without_o2d": (89.396,),
        "fed_lscl_without_replay": (50.298,),
        "fed_lscl_collaboration_only": (49.235,),
        "small_fedavg": (29.873,),
    },
    "ImageNet-R": {
        "fed_lscl_without_o2d": (80.780,),
        "fed_lscl_without_replay": (46.648,),
        "fed_lscl_collaboration_only": (45.377,),
        "small_fedavg": (27.298,),
    },
}
"""By data set and ablation: accuracy in % of the final model over all local tasks. The full method is not in it."""
