"""The SMB 3 protocol's data path, bytes in, events out: no socket, no clock, no thread."""
