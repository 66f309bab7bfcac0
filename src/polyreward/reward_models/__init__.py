"""What a sample is worth, learned from people: the contract that every reward model follows."""
