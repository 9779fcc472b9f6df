"""The needs of a training run, from its config alone: parameters, memory, time, disk, and what is missing."""
