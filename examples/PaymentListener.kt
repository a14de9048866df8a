// Reads payrelay's topic with Spring for Apache Kafka, each payment once. The records are the
// payments as JSON (kafka.format = "json"), so it asks payrelay nothing.
//
// It needs Java 17 or later, spring-kafka, spring-jdbc, a JDBC driver and Jackson 3 (tools.jackson).
// In a Spring Boot service, keep the listener and the two consumer properties that are not defaults:
//   spring.kafka.consumer.isolation-level=read_committed
//   spring.kafka.consumer.auto-offset-reset=earliest
//
// A record may come twice: after a crash of this program, or with kafka.delivery = "at-least-once".
// So the id of the event (ce_id) is stored in the same transaction as its effect, and known ids are
// dropped. Here the effect is a row in a table.

package payrelay.example

import org.apache.kafka.clients.consumer.ConsumerConfig
import org.apache.kafka.clients.consumer.ConsumerRecord
import org.apache.kafka.common.serialization.StringDeserializer
import org.springframework.context.annotation.AnnotationConfigApplicationContext
import org.springframework.context.annotation.Bean
import org.springframework.context.annotation.Configuration
import org.springframework.jdbc.core.JdbcTemplate
import org.springframework.jdbc.datasource.DataSourceTransactionManager
import org.springframework.jdbc.datasource.SingleConnectionDataSource
import org.springframework.kafka.annotation.EnableKafka
import org.springframework.kafka.annotation.KafkaListener
import org.springframework.kafka.config.ConcurrentKafkaListenerContainerFactory
import org.springframework.kafka.core.DefaultKafkaConsumerFactory
import org.springframework.kafka.listener.DefaultErrorHandler
import org.springframework.transaction.support.TransactionTemplate
import org.springframework.util.backoff.FixedBackOff
import tools.jackson.databind.json.JsonMapper
import javax.sql.DataSource

class PaymentListener(private val jdbc: JdbcTemplate, private val transaction: TransactionTemplate) {
    private val json = JsonMapper()

    // Not payment-group: that one is payrelay's own.
    @KafkaListener(topics = ["payment-event"], groupId = "payment-report")
    fun onPayment(record: ConsumerRecord<String?, String?>) {
        val value = record.value()
        // Another program may have written to the topic, and payrelay before its format was changed.
        if (value == null || header(record, "ce_dataschema") != "urn:payrelay:schema:payment:1") return
        val eventId = header(record, "ce_id") ?: return
        // Integers up to 2^63-1: `asLong` keeps them exact.
        val payment = json.readTree(value)
        transaction.executeWithoutResult {
            val isNew = jdbc.update(
                "INSERT INTO payment (event_id, payment_id, status, amount, currency) VALUES (?, ?, ?, ?, ?) " +
                    "ON CONFLICT DO NOTHING",
                eventId,
                payment["payment_id"].asLong(),
                payment["status"].asString(),
                payment["amount"].asLong(),
                payment["currency"].asString(),
            ) == 1
            if (isNew) {
                println("$eventId ${payment["status"].asString()} ${payment["amount"].asLong()} ${payment["currency"].asString()}")
            }
        }
    }

    private fun header(record: ConsumerRecord<*, *>, name: String) =
        record.headers().lastHeader(name)?.value()?.toString(Charsets.UTF_8)
}

@EnableKafka
@Configuration(proxyBeanMethods = false)
class Application {
    @Bean
    fun listener(source: DataSource): PaymentListener {
        val jdbc = JdbcTemplate(source)
        jdbc.execute(
            "CREATE TABLE IF NOT EXISTS payment (event_id TEXT PRIMARY KEY, payment_id INTEGER, " +
                "status TEXT, amount INTEGER, currency TEXT)",
        )
        return PaymentListener(jdbc, TransactionTemplate(DataSourceTransactionManager(source)))
    }

    @Bean
    fun source(): DataSource = SingleConnectionDataSource(System.getenv("DATABASE_URL"), true)

    @Bean
    fun kafkaListenerContainerFactory(): ConcurrentKafkaListenerContainerFactory<String, String> {
        val factory = ConcurrentKafkaListenerContainerFactory<String, String>()
        factory.setConsumerFactory(
            DefaultKafkaConsumerFactory(
                mapOf<String, Any>(
                    ConsumerConfig.BOOTSTRAP_SERVERS_CONFIG to System.getenv("BOOTSTRAP_SERVERS"),
                    // The records of aborted transactions are not shown.
                    ConsumerConfig.ISOLATION_LEVEL_CONFIG to "read_committed",
                    ConsumerConfig.AUTO_OFFSET_RESET_CONFIG to "earliest",
                    ConsumerConfig.KEY_DESERIALIZER_CLASS_CONFIG to StringDeserializer::class.java,
                    ConsumerConfig.VALUE_DESERIALIZER_CLASS_CONFIG to StringDeserializer::class.java,
                ),
            ),
        )
        // A payment is never skipped: it is tried again until the database accepts it.
        factory.setCommonErrorHandler(DefaultErrorHandler(FixedBackOff(1000, FixedBackOff.UNLIMITED_ATTEMPTS)))
        return factory
    }
}

fun main() {
    val context = AnnotationConfigApplicationContext(Application::class.java)
    context.registerShutdownHook()
    Thread.currentThread().join()
}
