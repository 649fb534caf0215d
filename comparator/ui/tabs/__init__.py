"""The tabs below the cards, one file each."""
