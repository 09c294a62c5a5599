"""The same federation on Flower: clients on other machines, or several at once on this one.

The only folder that knows Flower. `server` runs an experiment whose messages Flower carries, `client` answers for one
client; a node imports the client alone.
"""
