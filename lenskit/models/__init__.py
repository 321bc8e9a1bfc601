"""The zoo: one file an architecture family, on the ground that `base.py` lays."""
