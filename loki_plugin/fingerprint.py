def fingerprint(model): return {"stub": "x"}
def same_model(a,b): return None
