"""nn.Modules over the ops; they take plain numbers, not the config."""
