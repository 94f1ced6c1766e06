"""Ray actors and tasks with a deadline for their answers, after which they are ended."""
