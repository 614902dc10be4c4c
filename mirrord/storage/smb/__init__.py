"""Disks on SMB shares. Imported by disk processes that use one, and by nobody else."""
