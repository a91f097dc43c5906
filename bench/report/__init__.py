"""Show results as tables, Markdown, JSON, CSV and pictures; nothing is derived here."""
