"""Ray Train around the loop of one rank: trainer, shells, reusable workers, mailboxes, resources."""
