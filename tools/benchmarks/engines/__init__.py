"""One model trained by each engine and at each layout of up to two GPUs."""
