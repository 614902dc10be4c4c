"""mirrord moves a virtual disk to another place while its virtual machine keeps using it."""

__version__ = "0.1.0"
