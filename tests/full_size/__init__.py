"""The README's journey with random weights: at the real sizes (`-m large`), and at tiny ones (`-m slow`)."""
