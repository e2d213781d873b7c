"""The commands of the command line that need a module of their own, and what they share."""
