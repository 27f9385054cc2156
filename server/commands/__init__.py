"""The longer commands of `hope`, one file each."""
