"""What tars hold: scan them, describe those that others wrote, check all bytes against the index."""
