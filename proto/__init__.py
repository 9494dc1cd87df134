"""The one vocabulary: every event, who owns it, where it travels, and every message beside the log."""
