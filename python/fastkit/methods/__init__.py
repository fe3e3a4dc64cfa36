"""Published methods, a package each: configuration, what is done to a model, saving and loading."""
