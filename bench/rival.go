// The server that many would build in Go: gorilla/websocket and mattn/go-sqlite3, with the framing and the acks of
// Ringo Exp. peers.py builds and measures it.
//
// One goroutine per client reads messages of 4 bytes. One goroutine commits everything that has gathered, and acks to
// each client how many of its records are stored, as 8 bytes, big-endian.
package main

import (
	"context"
	"database/sql"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/gorilla/websocket"
	_ "github.com/mattn/go-sqlite3"
)

const (
	maxPending       = 65536 // records; the readers wait at this number
	rowsPerStatement = 256
)

type client struct {
	conn     *websocket.Conn
	stored   uint64
	gathered uint64 // records in the batch that is being committed
}

type record struct {
	client *client
	value  int32
}

var (
	mutex    sync.Mutex
	notEmpty = sync.NewCond(&mutex) // the committer waits for it
	notFull  = sync.NewCond(&mutex) // the readers wait for it
	pending  []record
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func read(conn *websocket.Conn) {
	defer conn.Close()
	from := &client{conn: conn}
	var payload [4]byte
	for {
		_, message, err := conn.NextReader()
		if err != nil {
			return
		}
		if _, err := io.ReadFull(message, payload[:]); err != nil {
			return
		}
		mutex.Lock()
		for len(pending) >= maxPending {
			notFull.Wait()
		}
		pending = append(pending, record{from, int32(binary.BigEndian.Uint32(payload[:]))})
		if len(pending) == 1 {
			notEmpty.Signal()
		}
		mutex.Unlock()
	}
}

func commit(database *sql.Conn) {
	ctx := context.Background()
	prepare := func(text string) *sql.Stmt {
		statement, err := database.PrepareContext(ctx, text)
		check(err)
		return statement
	}
	begin, end := prepare("BEGIN IMMEDIATE"), prepare("COMMIT")
	one := prepare("INSERT INTO record(value) VALUES (?)")
	many := prepare("INSERT INTO record(value) VALUES (?)" + strings.Repeat(",(?)", rowsPerStatement-1))
	execute := func(statement *sql.Stmt, values ...any) {
		_, err := statement.ExecContext(ctx, values...)
		check(err)
	}
	values := make([]any, 0, maxPending)
	var batch []record
	var clients []*client
	for {
		mutex.Lock()
		for len(pending) == 0 {
			notEmpty.Wait()
		}
		batch, pending = pending, batch[:0]
		mutex.Unlock()
		notFull.Broadcast()

		values, clients = values[:0], clients[:0]
		for _, record := range batch {
			values = append(values, record.value)
			if record.client.gathered == 0 {
				clients = append(clients, record.client)
			}
			record.client.gathered++
		}
		execute(begin)
		done := 0
		for ; done+rowsPerStatement <= len(values); done += rowsPerStatement {
			execute(many, values[done:done+rowsPerStatement]...)
		}
		for _, value := range values[done:] {
			execute(one, value)
		}
		execute(end)

		for _, client := range clients {
			client.stored += client.gathered
			client.gathered = 0
			var ack [8]byte
			binary.BigEndian.PutUint64(ack[:], client.stored)
			client.conn.WriteMessage(websocket.BinaryMessage, ack[:]) // a client that has left ends in its reader
		}
	}
}

func main() {
	ctx := context.Background()
	pool, err := sql.Open("sqlite3", "file:peer.db?_journal_mode=WAL&_synchronous=FULL")
	check(err)
	database, err := pool.Conn(ctx)
	check(err)
	_, err = database.ExecContext(ctx, "CREATE TABLE record(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
	check(err)
	go commit(database)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	upgrader := websocket.Upgrader{}
	check(http.Serve(listener, http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		if conn, err := upgrader.Upgrade(response, request, nil); err == nil {
			read(conn)
		}
	})))
}
