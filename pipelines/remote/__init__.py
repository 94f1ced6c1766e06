"""Ray actors and tasks that are given a time to answer in, and ended where they do not."""
