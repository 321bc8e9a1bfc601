"""Leaves of the zoo: norms, rotary embeddings, attention, MLPs. No architecture is named here."""
