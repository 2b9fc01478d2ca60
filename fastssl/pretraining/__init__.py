"""The pretraining loop, its trainer and step, the run folder, resume and replay."""
