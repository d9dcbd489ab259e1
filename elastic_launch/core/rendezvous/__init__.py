"""What a node decides in the rounds of a job: joining, leading, membership, heartbeats, ending, leaving."""
