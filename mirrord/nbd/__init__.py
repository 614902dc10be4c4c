"""The NBD protocol, both ends, without a socket: bytes in, requests and replies out. Pure."""
