"""One run of a configuration: its folder, what it shows, and what it leaves behind."""
