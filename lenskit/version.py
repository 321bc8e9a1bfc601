"""The version, for the package index, manifests and users."""

__version__ = "0.1.0"
