"""What a run looks like: its numbers, its pictures, and one page that holds them all."""
