"""One command for images of one's own: it looks at them, plans runs that fit into some minutes, and answers."""
