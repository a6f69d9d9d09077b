"""The task protocol, the registry, and the tasks that come with Wardround."""
