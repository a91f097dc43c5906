"""The stopwatch: a coordinator, one worker process per framework, timers, memory and the environment."""
