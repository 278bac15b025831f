"""What a run leaves behind: its folder, progress while it lasts, tables, pages and plots."""
