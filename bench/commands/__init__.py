"""The bodies of the commands: usage checks, calls into the other rooms, printing, exit statuses."""
