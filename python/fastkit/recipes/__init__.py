"""Methods on trial, each by one command, on data of its own or of the user."""
