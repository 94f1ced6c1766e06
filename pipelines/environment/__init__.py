"""The machine and process that code runs in: what a container may use, temporary files, secrets, which code it is."""
