"""What a training run needs, from its config alone: parameters, memory, time, disk, and what is missing."""
