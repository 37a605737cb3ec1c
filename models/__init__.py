"""Models: networks made of the attentions, as pure functions of their parameters."""
