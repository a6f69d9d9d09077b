"""Virtual federations: partitioners, engines, baselines. The only room that sees both sides."""
