"""The study of quality: models of each kind of attention, trained on the same data, compared."""
