"""What a job's workers get done: steps, stalls, stacks, goodput. Pure."""
