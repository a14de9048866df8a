-- Nodes whose events others deliver (node.role = "edge").
ALTER TABLE node ADD COLUMN role TEXT NOT NULL DEFAULT 'single' CHECK (role IN ('single', 'edge'));
ALTER TABLE node ADD COLUMN edge_through INTEGER NOT NULL DEFAULT 0;
ALTER TABLE topic_incarnation ADD COLUMN last_published INTEGER NOT NULL DEFAULT 0;
ALTER TABLE topic_incarnation ADD COLUMN "partition" INTEGER;
UPDATE topic_incarnation SET last_published = ifnull((SELECT max(id) FROM outbox
    WHERE status = 'PUBLISHED' AND "partition" IS NOT NULL), 0)
    WHERE first_seen_at = (SELECT max(first_seen_at) FROM topic_incarnation);
