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
INSERT INTO "attempts" VALUES(1,1,'g','rich','a','5cce6b9c11acc42c226fe7bc36492b2b6827e0a4cea12bf1e8f7df3c74b39589',1.79551918188435602192e+09,1.79551918188653802867e+09,'succeeded','{"task_id": "rich", "agent_id": "a", "termination_reason": "completed", "output": {"task": "rich", "text": "\u00e9\ud800", "number": 1.5, "list": [null, true]}, "error_message": null, "usage": {"input_tokens": 0, "output_tokens": 0, "requests": 0, "cost": 0.0}, "turns": 0, "duration_seconds": 0.0, "messages": [], "is_success": true, "is_failure": false, "total_cost": 0.0, "completion_summary": null}',10,5,1,0.25);
INSERT INTO "attempts" VALUES(2,1,'g','fails','fails','93592d53644a0638add6815ee0e0b0ae3f4713f5ff9f23331ea79a4295c78a55',1.79551918188627910614e+09,1.79551918188713192934e+09,'failed','ValueError: as always',10,5,1,0.25);
INSERT INTO "attempts" VALUES(3,1,'g','after','after','a494d78f5bcaac78b64727df3605e6ed23aad3064f1ccc7218e6f6e42fa07d0d',1.79551918188708305363e+09,1.79551918188770079616e+09,'succeeded','{"task_id": "after", "agent_id": "after", "termination_reason": "completed", "output": {"task": "after", "text": "\u00e9\ud800", "number": 1.5, "list": [null, true]}, "error_message": null, "usage": {"input_tokens": 0, "output_tokens": 0, "requests": 0, "cost": 0.0}, "turns": 0, "duration_seconds": 0.0, "messages": [], "is_success": true, "is_failure": false, "total_cost": 0.0, "completion_summary": null}',10,5,1,0.25);
CREATE TABLE executions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    group_id TEXT NOT NULL,
    started REAL NOT NULL,
    finished REAL
);
INSERT INTO "executions" VALUES(1,'old','g',1.7955191818842542172e+09,NULL);
CREATE INDEX attempts_by_task ON attempts (execution, group_id, task_id);
COMMIT;
