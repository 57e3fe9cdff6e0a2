"""What a build shows of itself: one page of HTML, and its model card."""
