"""Step times over sequence lengths, the models interleaved."""
