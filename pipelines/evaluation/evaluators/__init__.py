"""Networks that judge images, each with a record of which one it is."""
