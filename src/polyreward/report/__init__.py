"""What a person reads: HTML reports and terminal tables."""
