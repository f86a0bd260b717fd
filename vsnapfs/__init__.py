"""vsnapfs: a virtual block device with the ShadowCopy Protection mode of Windows."""

__version__ = "0.1.0"
