"""Sums over clients that the server learns without seeing what any of them sent (Bonawitz et al., 2017).

*Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017, the protocol against an honest but
curious server. In four steps a round: clients advertise keys, share their secrets among themselves, send their values
under masks, and help to take the masks off the sum. `party` is a client's side of it, `session` the server's; neither
knows what the values are. See docs/privacy.md for who must be trusted with what.
"""
