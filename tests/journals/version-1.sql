PRAGMA application_id = 1346464364;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY,
    execution INTEGER NOT NULL REFERENCES executions (id),
    group_id TEXT NOT NULL,
    task_id TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    started REAL NOT NULL,
    ended REAL,
    status TEXT NOT NULL DEFAULT 'started',
    content TEXT,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    requests INTEGER NOT NULL DEFAULT 0,
    cost REAL NOT NULL DEFAULT 0.0
);
INSERT INTO "attempts" VALUES(1,1,'g','rich','a','17dd7e4e65385b211216c4453de2f66a6b505b6bc4643bf482600c71f50a28e8',1.79553082551251578331e+09,1.79553082551609134677e+09,'succeeded','{"task_id": "rich", "agent_id": "a", "termination_reason": "completed", "output": {"task": "rich", "text": "\u00e9\ud800", "number": 1.5, "list": [null, true]}, "error_message": null, "usage": {"input_tokens": 0, "output_tokens": 0, "requests": 0, "cost": 0.0}, "turns": 0, "duration_seconds": 0.0, "messages": [], "is_success": true, "is_failure": false, "total_cost": 0.0, "completion_summary": null}',10,5,1,0.25);
INSERT INTO "attempts" VALUES(2,1,'g','fails','fails','953d50a35f3d3b881e04f4e8eb95da5b2feb7356b149009e768584e6fa3617b8',1.79553082551556730276e+09,1.79553082551732301713e+09,'failed','ValueError: as always',10,5,1,0.25);
INSERT INTO "attempts" VALUES(3,1,'g','after','after','aa621dc4484ed651fa9dd3556c4a1b97f1e57e997a628aad5179541bf94553f6',1.79553082551722979548e+09,1.79553082551865696905e+09,'succeeded','{"task_id": "after", "agent_id": "after", "termination_reason": "completed", "output": {"task": "after", "text": "\u00e9\ud800", "number": 1.5, "list": [null, true]}, "error_message": null, "usage": {"input_tokens": 0, "output_tokens": 0, "requests": 0, "cost": 0.0}, "turns": 0, "duration_seconds": 0.0, "messages": [], "is_success": true, "is_failure": false, "total_cost": 0.0, "completion_summary": null}',10,5,1,0.25);
CREATE TABLE executions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    group_id TEXT NOT NULL,
    started REAL NOT NULL,
    finished REAL
);
INSERT INTO "executions" VALUES(1,'old','g',1.79553082551235890394e+09,NULL);
CREATE INDEX attempts_by_task ON attempts (execution, group_id, task_id);
COMMIT;
