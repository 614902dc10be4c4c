"""libvirt's domains: their disks given to mirrord, and taken back. Needs the extra of that name."""
