"""What stands below Run: status line, summary, cards, sharing, and saved comparisons."""
