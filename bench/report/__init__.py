"""What is shown: tables, Markdown, JSON, charts. Reads records, never measures."""
